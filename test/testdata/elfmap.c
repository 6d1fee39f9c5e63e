// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A map as iproute2 wants it.
#include "test.h"

struct bpf_elf_map {
	__u32 type, size_key, size_value, max_elem, flags, id, pinning;
};

struct bpf_elf_map ldt_acl SEC("maps") = {
	.type = 1, .size_key = 4, .size_value = 8, .max_elem = 64, .pinning = 2,
};

SEC("xdp") int ldt_elfmap(struct xdp_md *ctx)
{
	__u32 key = ctx->ingress_ifindex;
	return bpf_map_lookup_elem(&ldt_acl, &key) ? XDP_DROP : XDP_PASS;
}
