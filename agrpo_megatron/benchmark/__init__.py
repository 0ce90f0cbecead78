"""Speed of rollouts and updates, with the published computation in plain torch to compare with."""
