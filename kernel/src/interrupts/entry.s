# The entry of all interrupts and exceptions. AT&T syntax.
#
# A stub of 16 bytes per vector makes all frames alike: where the CPU pushes no error code it pushes a 0, then the number
# of the vector. The common part saves all registers on the vector's own stack and calls `dispatch` with their address.
#
# GS base: an ordinary interrupt of ring 3 finds the user's, which is seen from the saved code segment. NMIs and those
# other exceptions that can come between two instructions of an entry or exit path may find the user's in ring 0 too: they
# look at the register itself. The kernel's GS base is an address of the upper half, a user's never is.

.section .text.interrupts, "ax", @progbits
.balign 16
.globl interrupt_stubs
interrupt_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    pushq $0
    .endif
    pushq $vector
    jmp interrupt_common
    .set vector, vector + 1
.endr

interrupt_common:
    cld
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %rdi                 # the frame: 15 registers, vector, error code, rip, cs, ...
    xorl %ebx, %ebx                 # whether GS base must be swapped back

    movq 120(%rdi), %rax
    cmpq $1, %rax                   # debug
    je 1f
    cmpq $2, %rax                   # NMI
    je 1f
    cmpq $8, %rax                   # double fault
    je 1f
    cmpq $18, %rax                  # machine check
    je 1f
    testb $3, 144(%rdi)             # the ring
    jz 3f
    jmp 2f
1:  movl $0xc0000101, %ecx          # GS base
    rdmsr
    testl %edx, %edx
    js 3f
2:  swapgs
    incl %ebx

3:  movq %rsp, %r12
    subq $512, %rsp
    andq $-16, %rsp
    fxsave64 (%rsp)
    call {dispatch}
    fxrstor64 (%rsp)
    movq %r12, %rsp
    testl %ebx, %ebx
    jz 4f
    swapgs
4:  popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
