"""The frozen base model as it is computed. The engine and training stand on it; it knows neither."""
