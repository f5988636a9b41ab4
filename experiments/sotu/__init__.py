"""`experiment=sotu`: sparse orthogonal parameters (arXiv 2411.02813) on a stream of five tasks."""
