# Entry of the secure loader block, in the state SKINIT leaves.
#
#   eax   SLB base, 64 KiB aligned        esp   SLB base + 10000h
#   cs    flat 32-bit code                ss    flat data; ds, es, fs, gs: unusable
#   cr0   PE; no paging                   efer  0; GIF = 0
#   idtr, gdtr, PAT, scratch half of the SLB: whatever the gap left
#
# Spec: [APM2] "Secure Startup with SKINIT", "SL_DEV", processor state at the SL entry point.
#
# To slb_main in long mode, on the stack of the scratch half, with
#   rdi   SLB base        rsi   the eight bytes at SLB_SLRT_POINTER_OFFSET
#   rdx   page tables     rcx   bytes of the measured part

.section .slb.entry, "ax"
.globl slb_entry
.code32
# Offsets from the SLB's base: SlbHeader lies before this section's first byte.
.set head, . - 16
.set no_idt, slb_no_idt - head
.set gdt, slb_gdt - head
.set gdt_limit, slb_gdt_end - slb_gdt - 1
.set long, slb_long - head
slb_entry:
    # No exception may vector through a table we did not write: with no IDT it is a shutdown.
    lidt    ss:[eax + no_idt]
    cld
    mov     ebx, eax
    # The stack's top overlaps the loader's pointer, so it is taken before anything is pushed.
    mov     ebp, ss:[ebx + {slrt_pointer}]
    mov     edx, ss:[ebx + {slrt_pointer} + 4]

    # GDTR wants a linear address, which only now is known.
    lea     eax, [ebx + gdt]
    mov     ss:[ebx + slb_tables + 2], eax
    mov     word ptr ss:[ebx + slb_tables], offset gdt_limit
    lgdt    ss:[ebx + slb_tables]
    mov     eax, {data}
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    xor     eax, eax
    mov     fs, eax
    mov     gs, eax
    lldt    ax
    mov     dr7, eax                            # no breakpoint of the gap's fires in us

    # Everything beyond the measured part held the gap's bytes.
    lea     edi, [ebx + slb_scratch]
    mov     ecx, offset slb_scratch
    neg     ecx
    add     ecx, 0x10000
    shr     ecx, 2
    rep stosd
    push    edx
    push    ebp

    # The table of addresses in the scratch half, made to fit our base.
    lea     esi, [ebx + slb_rela]
    lea     ecx, [ebx + slb_rela_end]
2:  cmp     esi, ecx
    jae     3f
    mov     edi, [esi]                          # R_X86_64_RELATIVE: offset; 8 bytes of type; addend
    mov     eax, [esi + 16]
    add     eax, ebx
    mov     [ebx + edi], eax
    add     esi, 24
    jmp     2b
3:

    # First page tables: the GiB of the SLB one to one, in 2 MiB pages. slb_main makes the real ones.
    lea     edi, [ebx + slb_tables]             # GiB table; +1000h directory; +3000h root
    lea     eax, [edi + {present_write}]
    mov     [edi + 0x3000], eax
    mov     ecx, ebx
    shr     ecx, 30
    lea     eax, [edi + 0x1000 + {present_write}]
    mov     [edi + ecx * 8], eax
    mov     eax, ebx
    and     eax, 0xc0000000
    or      eax, {present_write_large}
    xor     ecx, ecx
1:  mov     [edi + ecx * 8 + 0x1000], eax
    add     eax, 0x200000
    inc     ecx
    cmp     ecx, 512
    jb      1b

    # What our page tables mean must not be the gap's choice. Whatever it cached otherwise goes first.
    mov     ecx, {pat}
    mov     eax, {pat_low}
    mov     edx, {pat_high}
    wrmsr
    wbinvd
    add     edi, 0x3000
    mov     cr3, edi
    mov     eax, {cr4}
    mov     cr4, eax
    mov     ecx, {efer}
    mov     eax, {efer_value}
    xor     edx, edx
    wrmsr
    mov     eax, {cr0}                          # caches on, write protection for us too, paging
    mov     cr0, eax

    push    {code64}
    lea     eax, [ebx + long]
    push    eax
    retf
.code64
slb_long:
    mov     edi, ebx
    mov     esp, esp
    pop     rsi
    lea     edx, [rbx + slb_tables]
    mov     ecx, offset slb_scratch
    xor     ebp, ebp
    and     rsp, -16
    call    slb_main                            # does not return
    ud2

# An exception of ours: where it happened is what matters, the vector is plain from the instruction there.
.globl slb_exception_with_code, slb_exception
slb_exception_with_code:
    pop     rdi
slb_exception:
    cld
    pop     rdi                                 # RIP
    and     rsp, -16
    call    slb_fault                           # does not return
    ud2

# Accessed bits are set, so that no segment load writes to the measured part.
.balign 8
slb_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff                    # 08h: 32-bit code, as SKINIT loaded it
    .quad 0x00cf93000000ffff                    # 10h: data
    .quad 0x00af9b000000ffff                    # 18h: 64-bit code
slb_gdt_end:
slb_no_idt:
    .word 0
    .long 0
