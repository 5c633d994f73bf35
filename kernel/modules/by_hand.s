# Its own variable starts from 3000 on every CPU. The GS base is the distance from the template to the CPU's unit, so that
# a variable's address, of this module's or of the kernel's, is what an instruction names.

        .section .data..percpu, "aw", @progbits
        .balign 8
        .globl  by_hand_hits
by_hand_hits:
        .quad   3000

        .text
        .globl  by_hand_hit
by_hand_hit:
        incq    %gs:by_hand_hits(%rip)
        addq    $2, %gs:SHARED_HITS(%rip)
        movq    %gs:by_hand_hits(%rip), %rax
        ret
