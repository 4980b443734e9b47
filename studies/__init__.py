"""The runs behind the tables of the documents."""
