// Package apply makes a host have what documents declare: it reads what is there in one pass, lets
// package plan compare, and does what differs. It keeps nothing: what it has made it knows by the
// members' owner label, and what program runs by the program's mark.
package apply
