# The user program: rdi = a page of its own, whose end is its stack. Intel syntax.
#
# It sets its GS base to its page, and then looks again and again whether it still is. The page's first word is its own
# address, the second counts the calls.

.section .user, "a", @progbits
.globl user_program
user_program:
    mov r12, rdi
    mov [r12], r12
    mov qword ptr [r12 + 8], 0
    mov rdi, r12
    mov eax, {set_gs_base}
    syscall
    test rax, rax
    jnz 3f
1:  inc qword ptr [r12 + 8]
    mov eax, {count}
    syscall
    mov r13, rax
    mov ecx, 20
2:  dec ecx
    jnz 2b
    cmp gs:[0], r12
    jne 3f
    test r13, r13
    jz 1b
    xor edi, edi
    jmp 4f
3:  mov edi, 1
4:  xor eax, eax
    syscall
    ud2
