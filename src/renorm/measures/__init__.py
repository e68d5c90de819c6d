"""What is measured: distances of distributions, information criteria, smoothness, batch statistics, scores."""
