/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs that need something of the kernel's by its name. */
#include "test.h"

#define __ksym __attribute__((section(".ksyms")))
#define __kconfig __attribute__((section(".kconfig")))

struct bpf_dynptr {
	__u64 opaque[2];
} __attribute__((aligned(8)));

extern int bpf_dynptr_from_xdp(struct xdp_md *ctx, __u64 flags, struct bpf_dynptr *ptr) __ksym;
extern int LINUX_KERNEL_VERSION __kconfig;

static long (*const bpf_dynptr_read)(void *dst, __u32 len, const struct bpf_dynptr *src, __u32 offset,
				     __u64 flags) = (void *)201;

__u64 found;

/* ldt_kfunc drops UDP datagrams over IPv4 to port 7000, and calls a function of the kernel for it. */
SEC("xdp")
int ldt_kfunc(struct xdp_md *ctx)
{
	struct bpf_dynptr ptr;
	__u8 header[14 + 20 + 8];

	if (bpf_dynptr_from_xdp(ctx, 0, &ptr) || bpf_dynptr_read(header, sizeof(header), &ptr, 0, 0))
		return XDP_PASS;
	atomic_add(&found, 1);
	return header[14 + 9] == 17 && header[14 + 20 + 2] == (7000 >> 8) && header[14 + 20 + 3] == (7000 & 0xff) ?
		XDP_DROP : XDP_PASS;
}

/* ldt_kconfig drops all that goes to port 7000 on a kernel of this century. */
SEC("xdp")
int ldt_kconfig(struct xdp_md *ctx)
{
	return LINUX_KERNEL_VERSION > 0 && udp_port(ctx) == 7000 ? XDP_DROP : XDP_PASS;
}
