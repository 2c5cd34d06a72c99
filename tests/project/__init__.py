"""What holds for the project as a whole: pages, tables, options, environment."""
