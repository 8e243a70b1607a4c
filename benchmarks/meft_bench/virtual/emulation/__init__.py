"""Makes torch and transformers behave as they do on a GPU that is not there.

virtual_gpu             the virtual GPU: all of the following in one context
backend                 what the two backends have in common
cuda_backend            fake CUDA tensors, on a build of torch without CUDA
cpu_backend             fake CPU tensors that take the code paths of CUDA, where the
                        first cannot be used
cuda_stubs              stubs for the functions of `torch.cuda`
triton_stand_in         takes the memory that our Triton kernels take
assumed_activation      which neurons of sparse adapters a batch is assumed to
                        activate
gradient_accumulation   which gradients autograd adds up in place
unsupported             operators without an answer, and what to do then
"""
