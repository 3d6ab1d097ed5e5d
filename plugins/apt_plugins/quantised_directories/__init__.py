"""Directories of quantised safetensors files, whose experts and blocks are removed byte by byte."""
