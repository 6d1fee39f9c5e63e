// Package filters is the family of clsact (tc/ingress, tc/egress): a member is a
// direct-action filter, which has no owner. The filter's name is a label with the
// member's name, priority and owner.
package filters
