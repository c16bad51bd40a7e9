"""The explorer in the browser. Not built yet: until it is, `moescope report` writes the first figures as one page."""
