package testenv

// Sweep gives the tests access to what [Require] does once for each process.
var Sweep = sweep
