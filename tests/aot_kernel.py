"Compile `lut_matmul` for one chip of a v6e that is not there, in shapes of the 2.2B model; prints what each takes. Run by test_generate.py."
import os
os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v6e-8', TPU_WORKER_HOSTNAMES='localhost', TPU_WORKER_ID='0', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                  TPU_MIN_LOG_LEVEL='3', TPU_STDERR_LOG_LEVEL='3')
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nativebit.inference.packed_matmul import QuantizedTensor, lut_matmul, tiled

def shapes(O, I, block_shape, dtype, chip):
    "A tiled matrix of the 2.2B model, by its shapes."
    blocks = O*I//(block_shape[0]*block_shape[1])
    s = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    scale = s((blocks,), jnp.float16) if dtype == jnp.int8 else s((1,), jnp.float32)
    t = jax.eval_shape(tiled, QuantizedTensor(s((O*I//32*3,), jnp.uint32), s((blocks, 8), dtype), scale, (O, I), block_shape))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), t)

chip = NamedSharding(Mesh(topologies.get_topology_desc(platform='tpu', topology_name='v6e:2x4').devices[:1], 'x'), P())
for O,I in [(2560, 2560), (6912, 2560), (2560, 6912)]:
    for name,block,dtype in [('int8', (1, 128), jnp.int8), ('lut-b', (8, 64), jnp.bfloat16)]:
        for M in (1, 16):
            x = jax.ShapeDtypeStruct((M, I), jnp.bfloat16, sharding=chip)
            c = lut_matmul.lower(x, shapes(O, I, block, dtype, chip)).compile()
            m = c.memory_analysis()
            print(name, (O, I), M, 'arguments', m.argument_size_in_bytes, 'temporary', m.temp_size_in_bytes, flush=True)
print('compiled')
