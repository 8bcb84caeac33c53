"""What every package shares and none owns: errors, names, files, drawing. No torch here."""
