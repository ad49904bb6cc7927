"""A run as one page of HTML, and values as pictures in a notebook: `page`, `pictures`, `graph`."""
