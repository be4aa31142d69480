"""A customer's file of conversations, made into a training set: validated, cleaned, split, reported."""
