"""The history of a run: settings that changed during it, and where each attempt ran."""
