"""What is measured of a model: memorisation, utility, privacy, robustness."""
