package main

// tried is for docs/performance.md: how the open chain came to be what it is.
const tried = ``
