"""The `bespoke` sub-commands of serving and billing: a module for each, and what they share.

`common` has settings, store, console and JSON output; `tables` prints for people, `wire` shapes JSON that the
HTTP API has in several objects. `invoice` adds the commands of `invoice_lines`, `credit_note` and
`billing_details` to its own.
"""
