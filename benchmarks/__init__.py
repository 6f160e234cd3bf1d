"""Every figure the library claims, as something anyone can run again."""
