"""What a run costs, by arithmetic only."""
