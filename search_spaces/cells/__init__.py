"""The published spaces of cells and macro networks, one file each."""
