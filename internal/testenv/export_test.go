package testenv

// Sweep lets the tests call what [Require] does once for each process.
var Sweep = sweep
