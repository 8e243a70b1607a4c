"""Make torch and transformers behave as on a GPU that does not exist.

virtual_gpu             the virtual GPU: all of the following in one context
backend                 the common part of the two backends
cuda_backend            fake CUDA tensors, on a build of torch without CUDA
cpu_backend             fake CPU tensors that take the code paths of CUDA, for builds
                        where `cuda_backend` cannot be used
cuda_stubs              stubs for the functions of `torch.cuda`
cuda_streams            CUDA streams, of which one is current
ranks                   rank 0 of several that train together: process groups, FSDP2
replicas                DistributedDataParallel in such a rank
memory_answers          memory functions of `torch.cuda` and `torch.accelerator`
triton_launches         launches of Triton kernels, which do nothing
triton_stand_in         allocates the memory that our Triton kernels allocate
assumed_activation      which neurons of sparse adapters a batch is assumed to
                        activate
assumed_conditions      conditions that Python reads: true, but for `isnan` and the like
grouped_products        products of rows with their experts' matrices, in any dtype
known_values            values that follow from integers of the host
memo                    remembers what operators make of tensors of the same shapes
quantised_layers        virtual layers: linear layers with quantised weights
quantised_lora          PEFT's LoRA around them
operator_rules          rules for fake tensors that torch lacks
storages                storages that code makes or resizes without an operator
loading                 files of safetensors, loaded onto the GPU
refusals                what is not modelled, refused by name
early_imports           replaces functions that modules have imported by name
ordinary_code           what training code does besides training: saving, loading data
assumed_selection       selections by a mask, which keep all elements
gradient_accumulation   which gradients autograd accumulates in place
unsupported             errors for operators that fake tensors do not support
"""
