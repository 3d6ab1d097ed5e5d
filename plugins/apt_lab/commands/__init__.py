"""The commands: each reads its options, calls another package of apt_lab, and prints."""
