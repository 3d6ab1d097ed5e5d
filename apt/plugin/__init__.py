"""The plugin surface: hook specifications, specs, and the registry of what is installed."""
