"""The samples of models that do not read windows of text: texts, pairs of texts, images, sounds."""
