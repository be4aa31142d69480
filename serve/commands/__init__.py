"""One module per `bespoke` sub-command that belongs to serving and billing."""
