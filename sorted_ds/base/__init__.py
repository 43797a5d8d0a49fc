"""What every other folder stands on: errors, files, keyed shuffles. Imports nothing of this package."""
