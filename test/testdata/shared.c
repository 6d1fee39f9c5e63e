/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ldt_shared counts UDP datagrams to port 7000 in a map that is shared by its pin. shared_wide.o is the
 * same with a value that is wider, so that the two cannot share.
 */
#include "test.h"

#ifdef WIDE
struct value {
	__u64 count;
	__u64 more;
};
#else
struct value {
	__u64 count;
};
#endif

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct value);
	PIN_BY_NAME;
} ldt_counts SEC(".maps");

SEC("xdp")
int ldt_shared(struct xdp_md *ctx)
{
	__u32 zero = 0;
	struct value *v = bpf_map_lookup_elem(&ldt_counts, &zero);

	if (v && udp_port(ctx) == 7000)
		atomic_add(&v->count, 1);
	return XDP_PASS;
}
