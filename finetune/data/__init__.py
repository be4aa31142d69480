"""Turns a customer's file of conversations into a training set: validated, cleaned, split, reported."""
