/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Iterators that tell what holds BPF objects, and how often the kernel counts each
 * as held. What they write is read in ../iter.go.
 */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What an open file is; beyond the objects, files that lead to pins. */
enum kind {
	LINK,
	PROGRAM,
	MAP,
	BPFFS,	   /* a file or folder of a bpffs */
	NAMESPACE, /* of any type */
};

/*
 * The file operations tell the objects apart. They are not in kallsyms everywhere
 * (CONFIG_KALLSYMS_ALL), so they are learned from descriptors of the reader.
 */
int own_fds[3];
void *operations[3];

struct file_record {
	__u32 kind;
	__u32 id;
	__u32 pid; /* as the reader's pid namespace has it */
	__u32 tid;
	__u32 fd;
	__u32 own; /* of the reader */
	__u64 file;
	__u64 table;
	__u64 references; /* of a link; before Linux 5.19 ld_links cannot tell */
};

/* The number of a task in the reader's pid namespace. */
static __always_inline __u32 number(struct task_struct *task)
{
	struct task_struct *reader = (void *)bpf_get_current_task();
	struct pid *pid = READ(reader, thread_pid);
	unsigned int level = READ(pid, level);

	pid = READ(task, thread_pid);
	char *numbers = FIELD(pid, numbers);
	int nr = 0;
	if (level <= READ(pid, level))
		bpf_probe_read_kernel(&nr, sizeof(nr), numbers + level * SIZE(struct upid) + OFFSET(struct upid, nr));
	return nr;
}

SEC("iter/task_file")
int ld_files(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	if (!task || !file)
		return 0;

	struct file_record r = {
		.fd = ctx->fd,
		.own = task->tgid == bpf_get_current_pid_tgid() >> 32,
		.file = (long)file,
	};
	void *op = file->f_op;
	if (!operations[LINK] || !operations[PROGRAM] || !operations[MAP]) {
		for (int i = LINK; i <= MAP; i++)
			if (r.own && r.fd == (__u32)own_fds[i])
				operations[i] = op;
		return 0;
	}

	void *object = file->private_data;
	if (op == operations[LINK]) {
		r.kind = LINK;
		r.id = READ((struct bpf_link *)object, id);
		r.references = READ((struct bpf_link *)object, refcnt.counter);
	} else if (op == operations[PROGRAM]) {
		struct bpf_prog_aux *aux = READ((struct bpf_prog *)object, aux);
		r.kind = PROGRAM;
		r.id = READ(aux, id);
	} else if (op == operations[MAP]) {
		r.kind = MAP;
		r.id = READ((struct bpf_map *)object, id);
	} else {
		unsigned long magic = file->f_inode->i_sb->s_magic;
		if (magic == BPF_FS_MAGIC)
			r.kind = BPFFS;
		else if (magic == NSFS_MAGIC)
			r.kind = NAMESPACE;
		else
			return 0;
	}
	r.pid = number(task->group_leader);
	r.tid = number(task);
	r.table = (long)task->files;
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}

struct link_record {
	__u32 id;
	__u32 type;
	__u32 program;
	__u32 attached; /* XDP: to a device that still exists */
	__u64 target;	/* tracing, extension: the program that is traced or extended */
	__u64 references;
};

SEC("iter/bpf_link")
int ld_links(struct bpf_iter__bpf_link *ctx)
{
	struct bpf_link *link = ctx->link;
	if (!link)
		return 0;
	struct link_record r = {
		.id = link->id,
		.type = link->type,
		.references = link->refcnt.counter,
	};
	if (link->prog) /* a link of a struct_ops has none */
		r.program = link->prog->aux->id;
	if (r.type == BPF_LINK_TYPE_XDP && EXISTS(struct bpf_xdp_link, dev))
		r.attached = READ((struct bpf_xdp_link *)link, dev) != 0;
	if (r.type == BPF_LINK_TYPE_TRACING && EXISTS(struct bpf_tracing_link, tgt_prog))
		r.target = (long)READ((struct bpf_tracing_link *)link, tgt_prog);
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}

/* Pointers tell objects apart; the reader knows their ids from the other records. */
#define MAX_POINTERS 2048

void *pointers[MAX_POINTERS];

static __always_inline void write_pointers(struct seq_file *seq, const void *from, __u32 n)
{
	if (!n || n > MAX_POINTERS)
		return;
	if (bpf_probe_read_kernel(pointers, n * sizeof(*pointers), from))
		__builtin_memset(pointers, 0, 8);
	bpf_seq_write(seq, pointers, n * sizeof(*pointers));
}

struct program_record {
	__u32 id;
	__u32 maps; /* how many pointers follow */
	__u64 object;
	__u64 target; /* the program that it was loaded to extend or trace */
	__u64 references;
};

SEC("iter/bpf_prog")
int ld_programs(struct bpf_iter__bpf_prog *ctx)
{
	struct bpf_prog *prog = ctx->prog;
	if (!prog)
		return 0;
	struct bpf_prog_aux *aux = prog->aux;
	struct program_record r = {
		.id = aux->id,
		.maps = aux->used_map_cnt,
		.object = (long)prog,
		.target = (long)aux->dst_prog,
		.references = aux->refcnt.counter,
	};
	if (r.maps > MAX_POINTERS)
		r.maps = 0; /* never seen */
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	write_pointers(ctx->meta->seq, aux->used_maps, r.maps);
	return 0;
}

struct map_record {
	__u32 id;
	__u32 type;
	__u32 entries;
	__u32 slots; /* how many pointers to programs follow */
	__u64 object;
	__u64 references;
	__u64 users;
};

SEC("iter/bpf_map")
int ld_maps(struct bpf_iter__bpf_map *ctx)
{
	struct bpf_map *map = ctx->map;
	if (!map)
		return 0;
	struct map_record r = {
		.id = map->id,
		.type = map->map_type,
		.entries = map->max_entries,
		.object = (long)map,
		.references = map->refcnt.counter,
		.users = map->usercnt.counter,
	};
	/*
	 * Prog arrays are read here: a descriptor of one that has just lost its last
	 * user would keep it for good. Larger ones must be opened all the same.
	 */
	if (r.type == BPF_MAP_TYPE_PROG_ARRAY && r.entries <= MAX_POINTERS)
		r.slots = r.entries;
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	write_pointers(ctx->meta->seq, FIELD((struct bpf_array *)map, ptrs), r.slots);
	return 0;
}
