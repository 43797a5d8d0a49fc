"""What every other folder builds on: errors, files and keyed shuffles. Imports nothing else of this package."""
