"""What `import dataflex` offers in Python and in notebooks; each name is loaded when it is first used."""
