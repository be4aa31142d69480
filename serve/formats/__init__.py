"""Translates client JSON into requests and answers into client JSON, without HTTP: batches use it too."""
