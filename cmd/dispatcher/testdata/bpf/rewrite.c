/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Changes packets: it redirects IPv4 UDP from one port to another. */
#include "../../../../programs/bpf/xdp.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile __u16 from_port = 53;
const volatile __u16 to_port = 5353;

SEC("xdp")
int rewrite(struct xdp_md *ctx)
{
	__u8 *data = (void *)(long)ctx->data;

	if ((void *)(data + 42) > (void *)(long)ctx->data_end)
		return XDP_PASS;
	if (data[12] != 0x08 || data[13] != 0 || data[14] != 0x45 || data[23] != 17)
		return XDP_PASS;
	if ((data[36] << 8 | data[37]) != from_port)
		return XDP_PASS;
	data[36] = to_port >> 8;
	data[37] = to_port & 0xff;
	return XDP_PASS;
}
