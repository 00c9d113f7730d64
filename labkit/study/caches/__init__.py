"""Cache studies: traces replayed through prefix caches of many sizes and policies."""
