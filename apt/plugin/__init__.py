"""The plugin surface: hook specifications, specs, and the registry of installed plugins."""
