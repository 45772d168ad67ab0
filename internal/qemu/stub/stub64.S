/*
 * The guest of ProbeAccel: enters 64-bit mode, computes for a moment (long
 * enough that the host's timer interrupts it), and says so on the debug exit
 * port. Loaded by QEMU's multiboot loader. Built by hand into stub64.bin:
 *
 *	gcc -c -o stub64.o stub64.S && objcopy -O binary stub64.o stub64.bin
 *
 * The directory holds no Go, or the go tool would take this for its own assembly.
 */
	.set	base, 0x100000
	.code32
start:	jmp	1f
	.balign	4
mb:	.long	0x1BADB002			/* multiboot: addresses are given */
	.long	0x00010000
	.long	-(0x1BADB002 + 0x00010000)
	.long	base + (mb - start)
	.long	base
	.long	0
	.long	base + (end - start)
	.long	base
1:	cli
	mov	$0x1000, %edi			/* page tables: the first GiB, 2 MiB pages */
	xor	%eax, %eax
	mov	$3072, %ecx
	cld
	rep stosl
	movl	$0x2003, 0x1000
	movl	$0x3003, 0x2000
	mov	$0x83, %eax
	mov	$0x3000, %edi
	mov	$512, %ecx
2:	mov	%eax, (%edi)
	add	$0x200000, %eax
	add	$8, %edi
	loop	2b
	mov	$0x1000, %eax
	mov	%eax, %cr3
	mov	%cr4, %eax
	or	$0x620, %eax			/* PAE, SSE */
	mov	%eax, %cr4
	mov	$0xC0000080, %ecx		/* EFER.LME */
	rdmsr
	or	$0x100, %eax
	wrmsr
	lgdt	gdtr - start + base
	mov	%cr0, %eax
	and	$0xFFFFFFFB, %eax
	or	$0x80000003, %eax
	mov	%eax, %cr0
	ljmp	$8, $(3f - start + base)
	.code64
3:	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$0x80000, %esp
	movabs	$0x123456789abcdef0, %r8
	mov	$20000000, %ecx
4:	rol	$7, %r8
	add	%rcx, %r8
	dec	%ecx
	jnz	4b
	push	%r8
	pop	%r9
	cmp	%r8, %r9
	jne	5f
	cvtsi2sd %r8, %xmm1
	addsd	%xmm1, %xmm1
	mov	$0xf4, %dx
	mov	$0x2a, %al			/* QEMU exits with 2*0x2a+1 */
	out	%al, %dx
5:	hlt
	jmp	5b
	.balign	8
gdt:	.quad	0
	.quad	0x00209A0000000000
	.quad	0x0000920000000000
gdtr:	.word	23
	.long	gdt - start + base
end:
