"""Measures of iterations: updates combined, sums so far, memory and use of the devices."""
