"""From measurements to tables, pictures and one HTML page."""
