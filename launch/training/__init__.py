"""Parts of the training commands: checks, outputs, tables, pair making."""
