"""The engine: requests in, token streams out. It knows neither HTTP nor a database."""
