"""The output directory: the checks of its place, the staging folder, the report and the card."""
