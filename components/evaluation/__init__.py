"""One scoring pass, metrics as plain functions of its records, and the report."""
