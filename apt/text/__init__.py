"""From documents to calibration tokens: data sources, files, sampling, augmentation."""
