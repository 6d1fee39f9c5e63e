// Package filters is the family of clsact (tc/ingress, tc/egress): a member is a
// direct-action filter, which nobody owns. The filter's name says whose it is.
package filters
