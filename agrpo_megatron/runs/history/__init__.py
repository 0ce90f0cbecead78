"""The history of a run: settings that changed as it went on, and where each attempt ran."""
